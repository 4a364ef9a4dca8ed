"""Classes of the semantic maps of ADE20K and COCO.

ADE20K: the 150 classes of the scene parsing benchmark, and their codes in the full releases. Figures from
CSAILVision/sceneparsing: names (the first of each class's synonyms) from objectInfo150.txt, codes from
convertFromADE/mapFromADE.txt; the releases of 2016 and 2021 have the same codes. COCO: labels.txt of
nightrome/cocostuff.
"""

import numpy as np


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(";"))


ADE20K_CLASSES = _names(
    """
    unknown; wall; building; sky; floor; tree; ceiling; road; bed; windowpane; grass; cabinet; sidewalk; person;
    earth; door; table; mountain; plant; curtain; chair; car; water; painting; sofa; shelf; house; sea; mirror; rug;
    field; armchair; seat; fence; desk; rock; wardrobe; lamp; bathtub; railing; cushion; base; box; column; signboard;
    chest of drawers; counter; sand; sink; skyscraper; fireplace; refrigerator; grandstand; path; stairs; runway;
    case; pool table; pillow; screen door; stairway; river; bridge; bookcase; blind; coffee table; toilet; flower;
    book; hill; bench; countertop; stove; palm; kitchen island; computer; swivel chair; boat; bar; arcade machine;
    hovel; bus; towel; light; truck; tower; chandelier; awning; streetlight; booth; television; airplane; dirt track;
    apparel; pole; land; bannister; escalator; ottoman; bottle; buffet; poster; stage; van; ship; fountain; conveyer
    belt; canopy; washer; plaything; swimming pool; stool; barrel; basket; waterfall; tent; bag; minibike; cradle;
    oven; ball; food; step; tank; trade name; microwave; pot; animal; bicycle; lake; dishwasher; screen; blanket;
    sculpture; hood; sconce; vase; traffic light; tray; ashcan; fan; pier; crt screen; plate; monitor; bulletin board;
    shower; radiator; glass; clock; flag
    """
)
"""By class id; 0: no class."""

_ADE20K_CODES = """
    2978 312 2420 976 2855 447 2131 165 3055 1125 350 2377 1831 838 774/783 2684 1610 1910 687 471 401 2994 1735 2473
    2329 1276 2264 1564 2178 913 57 2272 907 724 2138 2985/533 1395 155 2053 689 137 266 581 2380 491 627 2212 2388
    2423 943 2096 1121 1788 2530 2185 420 1948 1869 2251 2531 2128 294 239 212 571 2793 978 236 1240 181 629 2598 1744
    1374 591 2679 223 123 47 1282 327 2821 1451 2880 2828 480 77 2616 246/247 2733 14 738 38 1936 1401 120 868 1702
    249 308 1969 2526 2928 2337 1023 609 389 2989 1930 2668 2586 131 146 3016 2739 95 1563 642 1708 103 1002 2569 2704
    2833 1551 1981 29 187 1393 747 2254 206 2262 1260 2243 2932 2836 2850 64 894 1858 3109 1919 1583 318 2356 2046
    1098 530 954
"""
"""The codes of classes 1 to 150 in the full releases; three classes have two."""

ADE20K_CODE_TO_CLASS = np.zeros(1 << 16, dtype=np.uint8)
"""Class id of each code, R // 10 * 256 + G of a _seg.png."""
for _label, _codes in enumerate(_ADE20K_CODES.split(), start=1):
    ADE20K_CODE_TO_CLASS[[int(code) for code in _codes.split("/")]] = _label

COCO_CLASSES = _names(
    """
    unlabeled; person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant;
    street sign; stop sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe;
    hat; backpack; umbrella; shoe; eye glasses; handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite;
    baseball bat; baseball glove; skateboard; surfboard; tennis racket; bottle; plate; wine glass; cup; fork; knife;
    spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut; cake; chair; couch; potted
    plant; bed; mirror; dining table; window; desk; toilet; door; tv; laptop; mouse; remote; keyboard; cell phone;
    microwave; oven; toaster; sink; refrigerator; blender; book; clock; vase; scissors; teddy bear; hair drier;
    toothbrush; hair brush; banner; blanket; branch; bridge; building-other; bush; cabinet; cage; cardboard; carpet;
    ceiling-other; ceiling-tile; cloth; clothes; clouds; counter; cupboard; curtain; desk-stuff; dirt; door-stuff;
    fence; floor-marble; floor-other; floor-stone; floor-tile; floor-wood; flower; fog; food-other; fruit;
    furniture-other; grass; gravel; ground-other; hill; house; leaves; light; mat; metal; mirror-stuff; moss;
    mountain; mud; napkin; net; paper; pavement; pillow; plant-other; plastic; platform; playingfield; railing;
    railroad; river; road; rock; roof; rug; salad; sand; sea; shelf; sky-other; skyscraper; snow; solid-other; stairs;
    stone; straw; structural-other; table; tent; textile-other; towel; tree; vegetable; wall-brick; wall-concrete;
    wall-other; wall-panel; wall-stone; wall-tile; wall-wood; water-other; waterdrops; window-blind; window-other;
    wood; other
    """
)
"""Names by COCO's class id; "other", in the pixelmaps of the stuff challenge, is everything that is not stuff."""
