"""What people type: one short file per command."""
