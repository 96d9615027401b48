"""What the user reads: ``report`` is the record, the others are tables, charts and pages."""
