"""What a network looks at, and whether such maps mean anything."""
