"""The commands of `adapterd`, one module for each noun. `server/cli.py` puts them together; nothing else imports them."""
