"""The steps, one file each, oldest first. A step that was released never changes, so it repeats names and types of its time."""
