"""On-disk format of data sets: shards, columns and manifests."""
