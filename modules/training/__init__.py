"""What the web process and the process that trains both know of a training: its messages, its data, its folder."""
