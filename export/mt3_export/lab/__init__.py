"""The precision lab: what a precision costs in notes, and what it brings in time."""
