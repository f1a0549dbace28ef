"Run lessons from top to bottom and save what they show: `python tools/lessons.py [notebook …]`"
import sys
sys.exit("being written")
