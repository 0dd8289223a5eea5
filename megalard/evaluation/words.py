"""Words that the keys of retrieval tasks are made of: some 11,000 pairs."""

# fmt: off
ADJECTIVES = (
    "amber", "ancient", "arctic", "autumn", "bitter", "blue", "bold", "brave", "bright", "broken",
    "calm", "careful", "clever", "cold", "crimson", "crystal", "daring", "distant", "dusty",
    "early", "eager", "empty", "fancy", "fierce", "frozen", "gentle", "giant", "golden", "grand",
    "green", "happy", "hidden", "hollow", "humble", "icy", "iron", "jolly", "keen", "large",
    "lively", "lonely", "lucky", "mellow", "mighty", "misty", "modern", "noble", "northern",
    "pale", "patient", "plain", "polite", "proud", "purple", "quick", "quiet", "rapid", "rough",
    "royal", "rusty", "scarlet", "secret", "sharp", "shiny", "silent", "silver", "simple",
    "sleepy", "small", "smooth", "snowy", "solid", "southern", "spare", "steady", "stormy",
    "strong", "sudden", "summer", "sunny", "tall", "tender", "thick", "tidy", "tiny", "vast",
    "velvet", "violet", "warm", "western", "white", "wild", "windy", "winter", "wise", "wooden",
    "yellow", "young",
)
# fmt: on

# fmt: off
NOUNS = (
    "anchor", "apple", "arrow", "badger", "banner", "barrel", "basket", "beacon", "bear",
    "beetle", "blossom", "boat", "bottle", "branch", "bridge", "brook", "bucket", "button",
    "camel", "candle", "canyon", "carpet", "castle", "cedar", "circle", "cloud", "comet", "coral",
    "cradle", "crane", "dolphin", "dragon", "eagle", "engine", "falcon", "feather", "ferry",
    "fiddle", "forest", "fountain", "fox", "garden", "garnet", "glacier", "goose", "hammer",
    "harbor", "hazel", "heron", "hill", "horse", "island", "ivory", "jacket", "jungle", "kettle",
    "kite", "ladder", "lake", "lantern", "lemon", "lion", "lizard", "magnet", "maple", "marble",
    "meadow", "mirror", "monkey", "mountain", "needle", "ocean", "olive", "orchid", "otter",
    "owl", "paddle", "panther", "paper", "parrot", "pebble", "pepper", "piano", "pigeon",
    "pillow", "planet", "pocket", "prairie", "puzzle", "rabbit", "raven", "ribbon", "river",
    "rocket", "saddle", "salmon", "shadow", "shell", "spider", "stone", "sunset", "table",
    "temple", "thunder", "tiger", "tower", "trumpet", "tulip", "turtle", "valley", "violin",
    "walnut", "whale", "willow", "window", "wolf", "zebra",
)
# fmt: on
