"""What all parts rest on; it rests on nothing of ours."""
