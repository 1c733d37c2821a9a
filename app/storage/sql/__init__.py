"""What embedgate keeps in a database: SQLite on this machine, or Postgres for all replicas."""
