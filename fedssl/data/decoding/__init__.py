"""Files of any kind -> pictures -> records: in processes that may die."""
