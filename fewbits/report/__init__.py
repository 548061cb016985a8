"""What people see: plots, pages, tables."""
