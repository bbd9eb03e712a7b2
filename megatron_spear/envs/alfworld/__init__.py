"""ALFWorld's text games in pure Python, with the rules and the words of the TextWorld original."""
