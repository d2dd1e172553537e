"Small trees of images for tests."
from pathlib import Path
import cv2
from imgexp.samples import shapes

CLASSES = ('circle', 'square', 'star5', 'cross')

def tree(folder, per_class=10, classes=('circle', 'square'), side=20, seed=0):
    "A folder of class folders with drawn shapes in them, as PNG."
    table = shapes(10*per_class, size=side, seed=seed)
    for c in classes:
        path = Path(folder)/c
        path.mkdir(parents=True, exist_ok=True)
        rows = (table.labels == table.classes.index(c)).nonzero()[0]
        for i, row in enumerate(rows): cv2.imwrite(str(path/f'{i:03d}.png'), table.source.pixels[row][..., ::-1])
    return Path(folder)
