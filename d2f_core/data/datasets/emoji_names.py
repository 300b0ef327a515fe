"""The `core`, `starter` and `few` subsets of the emoji set: pictures that a small network can learn from their names.

Chosen by hand for things with a shape or a colour of their own. Left out: flags, letters, clocks, arrows and keycaps
(signs rather than pictures); people, families and hands (many near-equal drawings); several versions of one thing.
Names are Unicode's English short names.
"""

FACES = """
grinning face; grinning squinting face; face with tears of joy; slightly smiling face; upside-down face; melting face;
winking face; smiling face with halo; smiling face with hearts; smiling face with heart-eyes; star-struck; face
blowing a kiss; face with tongue; zany face; money-mouth face; thinking face; zipper-mouth face; neutral face; face
without mouth; face with rolling eyes; grimacing face; sleeping face; face with medical mask; face with head-bandage;
nauseated face; hot face; cold face; face with crossed-out eyes; exploding head; cowboy hat face; partying face;
smiling face with sunglasses; nerd face; face with monocle; frowning face; face with open mouth; flushed face; loudly
crying face; face screaming in fear; enraged face; face with symbols on mouth; smiling face with horns; skull; clown
face; ghost; alien; robot; pile of poo; jack-o-lantern
"""

HEARTS = """
red heart; pink heart; orange heart; yellow heart; green heart; blue heart; light blue heart; purple heart; brown
heart; black heart; grey heart; white heart; broken heart; heart with ribbon; sparkling heart; two hearts; heart on
fire
"""

ANIMALS = """
grinning cat; monkey face; dog face; fox; cat face; lion; tiger face; horse face; unicorn; zebra; cow face; pig face;
camel; giraffe; elephant; mouse face; rabbit face; bat; bear; koala; panda; chicken; baby chick; bird; penguin; duck;
owl; flamingo; peacock; parrot; frog; crocodile; turtle; snake; sauropod; T-Rex; spouting whale; fish; tropical fish;
shark; octopus; crab; lobster; snail; butterfly; bug; ant; honeybee; lady beetle; spider
"""

FOOD = """
grapes; melon; watermelon; tangerine; lemon; banana; pineapple; red apple; green apple; pear; peach; cherries;
strawberry; blueberries; kiwi fruit; tomato; coconut; avocado; eggplant; carrot; ear of corn; hot pepper; bell pepper;
broccoli; onion; mushroom; bread; croissant; cheese wedge; poultry leg; hamburger; french fries; pizza; hot dog; taco;
egg; cooking; popcorn; rice ball; sushi; dango; soft ice cream; ice cream; doughnut; cookie; birthday cake; cupcake;
candy; lollipop; honey pot; glass of milk; hot beverage; teapot; wine glass; cocktail glass; beer mug; cup with straw
"""

PLANTS = """
cherry blossom; rose; sunflower; tulip; seedling; potted plant; evergreen tree; deciduous tree; palm tree; cactus;
four leaf clover; maple leaf; Christmas tree
"""

SKY = """
full moon; crescent moon; full moon face; sun; sun with face; ringed planet; star; shooting star; cloud; cloud with
rain; cloud with lightning; tornado; rainbow; umbrella with rain drops; high voltage; snowflake; snowman; fire;
droplet; water wave
"""

PLACES = """
volcano; house; tent; locomotive; bus; fire engine; police car; taxi; automobile; tractor; bicycle; sailboat;
airplane; helicopter; rocket; flying saucer; globe showing Americas
"""

OBJECTS = """
balloon; wrapped gift; trophy; sports medal; soccer ball; basketball; volleyball; tennis; bullseye; kite; pool 8 ball;
game die; puzzle piece; teddy bear; sunglasses; necktie; t-shirt; jeans; scarf; socks; dress; backpack; running shoe;
high-heeled shoe; crown; top hat; lipstick; ring; gem stone; bell; musical note; guitar; drum; telephone; battery;
laptop; television; camera; candle; light bulb; closed book; open book; money bag; coin; envelope; package; pencil;
crayon; paintbrush; scissors; locked; key; hammer; axe; shield; bomb; gear; magnet; pill; door; chair; alarm clock;
hourglass done; anchor; red circle; orange circle; yellow circle; green circle; blue circle; purple circle; red
square; blue square; green square; yellow square
"""

STARTER = """
grinning face; face with tears of joy; winking face; smiling face with heart-eyes; loudly crying face; enraged face;
smiling face with sunglasses; sleeping face; skull; clown face; ghost; alien; robot; jack-o-lantern; red heart; pink
heart; yellow heart; green heart; blue heart; purple heart; black heart; broken heart; two hearts; heart on fire; dog
face; fox; cat face; lion; cow face; pig face; elephant; mouse face; rabbit face; bear; koala; panda; baby chick;
penguin; owl; frog; turtle; spouting whale; fish; tropical fish; octopus; crab; butterfly; honeybee; lady beetle;
grapes; watermelon; tangerine; lemon; banana; pineapple; red apple; green apple; pear; cherries; strawberry; tomato;
avocado; carrot; broccoli; mushroom; croissant; hamburger; pizza; hot dog; ice cream; doughnut; cookie; birthday cake;
cupcake; lollipop; teapot; cherry blossom; rose; sunflower; tulip; potted plant; evergreen tree; palm tree; cactus; four
leaf clover; maple leaf; crescent moon; sun; ringed planet; star; cloud; rainbow; high voltage; snowman; fire; droplet;
house; tent; bus; taxi; automobile; sailboat; airplane; rocket; balloon; wrapped gift; trophy; soccer ball; basketball;
guitar; crown; top hat; bell; gem stone; light bulb; envelope; pencil; key; bomb; anchor
"""

FEW = """
grinning face; loudly crying face; smiling face with sunglasses; enraged face; red heart; blue heart; yellow heart;
black heart; cat face; dog face; panda; frog; fish; octopus; red apple; banana; strawberry; watermelon; pizza;
hamburger; sunflower; cherry blossom; evergreen tree; cactus; rocket; rainbow; snowman; star; house; tent; bus; anchor
"""

GROUPS = {
    "faces": FACES,
    "hearts": HEARTS,
    "animals": ANIMALS,
    "food": FOOD,
    "plants": PLANTS,
    "sky": SKY,
    "places": PLACES,
    "objects": OBJECTS,
}


def core_names() -> tuple[str, ...]:
    """Names of the core subset, in the order of the groups."""
    return tuple(name for group in GROUPS.values() for name in _names(group))


def starter_names() -> tuple[str, ...]:
    """Names of the starter subset: the 120 of the core subset with the plainest shapes."""
    return _names(STARTER)


def few_names() -> tuple[str, ...]:
    """Names of the `few` subset: 32 of the starter's, which a small network memorises in a minute on two cores."""
    return _names(FEW)


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(";"))
