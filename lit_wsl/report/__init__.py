"""Reports: tables and trees for the terminal, HTML pages, loggers."""
