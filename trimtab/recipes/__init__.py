"""One file per command: what it wires, its config, nothing else. torch is imported when a command runs, not before."""
