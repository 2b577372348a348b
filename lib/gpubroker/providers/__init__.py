"""The only knowledge of vendors: one file per vendor, found by its name."""
