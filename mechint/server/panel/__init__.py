"""The panel: server-rendered pages, one style sheet and one script."""
