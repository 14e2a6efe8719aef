"""What the scripts share. Nothing here is started by a user."""
