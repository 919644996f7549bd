"""The configuration: its data and its parser."""
