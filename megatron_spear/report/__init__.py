"""One HTML file that shows what runs did: curves, trajectories, replay, comparison; no torch."""
