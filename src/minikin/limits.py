"""What a prompt may say of a concept; apart from the recipes, so that concepts are read without pydantic."""

MAX_STRENGTH = 2.0  # of a concept in a prompt
POINT_NAMES = ("faithful", "balanced", "creative")  # operating points that a sweep measures
