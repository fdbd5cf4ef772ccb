"""What the commands do, free of any terminal: compress, export, bench, check, report."""
