"""Audio, images and files: what comes from disk and pipes, and goes there."""
