"""How the demo adapters in server/demo were made. Not collected by pytest; see README.md."""
