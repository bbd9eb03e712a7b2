"""Math problems that are solved with a code interpreter."""
