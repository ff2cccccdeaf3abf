"""What a command does once it is composed: its phase, or many of them at once."""
