"""The operators' calls: a unix socket for root alone, its server and its client."""
