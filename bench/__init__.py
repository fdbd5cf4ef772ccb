"""The project's own benchmark programs, their data and their measured results."""
