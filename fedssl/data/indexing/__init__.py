"""From a folder of files to the index: what is new is decoded, what is known is left alone."""
