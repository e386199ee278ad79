"""What a model is worth: bits per byte, CORE, chat tasks."""
