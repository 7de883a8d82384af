"""Every way of connecting to Redis, and what each of them has to stand."""
