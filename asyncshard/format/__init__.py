"""The formats on disk: the safetensors header, the index, the file names of shards. Pure: no I/O and no async."""
