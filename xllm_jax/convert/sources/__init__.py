"""Published formats, one file each: how its tensor names and layouts become ours."""
