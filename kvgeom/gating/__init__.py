"""Two live servers compared: does the candidate keep the refusals of the baseline?"""
