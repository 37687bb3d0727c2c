"""The one scorer: metrics with intervals, counts, pictures and the report."""
