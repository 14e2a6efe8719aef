"""What knows AutoGen: which of its methods record, and how its calls, replies and messages are written down."""
