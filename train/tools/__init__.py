"""Tools that measure costs, time and memory, and that convert or share what was trained."""
