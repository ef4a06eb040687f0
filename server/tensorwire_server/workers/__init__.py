"""Worker processes: who keeps them alive, what runs in them, and the engines without torch."""
