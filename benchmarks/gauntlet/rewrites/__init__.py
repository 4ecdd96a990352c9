"""Well-known networks written again, the way users and tutorials write them. Names, fusions and orders are theirs."""
