"""Reading and writing of audio and images, on disk and through pipes."""
