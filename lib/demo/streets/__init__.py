"""Renders a miniature adaptation pair: street views that look like a game (source) and like a camera (target).

    python -m lib.demo.streets OUT --seed 1

The source lies in the GTA5 layout and the target in the Cityscapes layout, both with Cityscapes' label ids (CLASSES).
A view is a list of planar faces in world metres, painted far to near into one image of face numbers. Labels are the
faces' classes, so they are exact; colours come from shading the same faces per pixel (position, texture, light, haze).
What separates the domains is one `Look` each: the colours of every class, its share, light and camera. Mean and
deviation of each colour channel are the same in both, so that matching them adapts nothing.

    look.py     classes, and the two domains' colours, light, camera and traffic
    scene.py    the camera's geometry, faces and cast shadows
    objects.py  what stands in a street, and how one is composed
    shading.py  from faces to a picture and its labels
    render.py   files on disk
"""
from lib.demo.streets.render import render_demo

__all__ = ["render_demo"]
