"""Studies: what a setting changes, over seeds, by a command that goes on after a kill."""
