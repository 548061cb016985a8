"""What the user chose: precisions, plans, and what this device runs natively."""
