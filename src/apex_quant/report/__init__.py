"""Reports from results files: plots, one HTML page, model cards, and which file to take."""
