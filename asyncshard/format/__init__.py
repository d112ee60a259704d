"""What is on disk: the safetensors header, the index, the names of shards. Pure: no I/O, nothing asynchronous."""
