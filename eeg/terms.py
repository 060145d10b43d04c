"""What a text beside EEG means: a seizure, its start or end, none, or a doubt of one. The words of
many languages, and what the user adds to them.
"""
import re
import unicodedata
from dataclasses import dataclass

from eeg.edf import DataError

# TUSZ annotation codes
SEIZURE = set("seiz fnsz gnsz spsz cpsz absz tnsz cnsz tcsz atsz mysz nesz".split())
_SEIZURE = r"(seizure|seiz|sz|anfall|crise|crisis|crisi|aanval|napad)"
_ITS = r"(seizure|seiz|sz|anfall|anfalls|anfalles|crise|crisis|crisi|aanval|napad|napadu)"
_OF = r" ?((of|des|de|di|the|la|della|van) )*"
_START = (r"(starts?|started|begins?|beginning|beginn|anfang|onset|on|debut|inicio|inizio|"
          r"poczatek)")
_END = r"(ends?|ended|stops?|stopped|offset|off|ende|fin|fine|einde|koniec)"
# "no clinical seizure" and "no further seizure" leave room for one
_NO = r"(no|keine?|pas de|sin|ohne) (electrographic )?"
# of SzCORE's types, sz_foc_ia_m_automatisms
_TYPE = (r"(i?a|ua|n?m|u[cm]|f2b|auto\w+|\w*(tonic|clonic|clonia|spasms?)|hyper\w+|behaviou?r\w*|"
         r"cognitive|emotional|sensory|a?typical|absence|unclassified)")
DEFAULT_TEXTS = {                       # what a text means, whole, without its number
    "start": re.compile(rf"{_ITS}{_OF}{_START}|{_START}{_OF}{_ITS}"),
    "end": re.compile(rf"{_ITS}{_OF}{_END}|{_END}{_OF}{_ITS}"),
    "seizure": re.compile(rf"{_SEIZURE}|sz (foc|gen|uo)( {_TYPE})*|{'|'.join(sorted(SEIZURE))}"),
    "background": re.compile(rf"bckg|background|seizure free|anfallsfrei|"
                             rf"{_NO}({_SEIZURE}s?|anfalle?)")}
# a text that speaks of a seizure, misspelt too; where its meaning is not known, nothing is known.
# Epileptiform discharges and cycles per second (9 cps) are none
_WORD = "seizure"                       # with a letter less, another, one more, or two exchanged
_MISSPELT = "|".join(form for i in range(7) for form in (
    _WORD[:i] + ".?" + _WORD[i + 1:], _WORD[:i + 1] + "." + _WORD[i + 1:],
    _WORD[:i] + _WORD[i + 1:i + 2] + _WORD[i] + _WORD[i + 2:]))
SPEAKS = re.compile(
    _MISSPELT +
    r"|seiz|\bs z\b|"
    r"\b[a-z]{0,3}sz([srd]?\b|es\b|[srd]?\d|on|off|st|beg|end)|\b[b-df-hj-np-tv-z]{4}sz\b|"
    r"anfa(ll|ld|ell|l\b)|\banf\b|onset|[ck]ri[sz][aei]|\bkriz\b|"
    r"(?<!inter)(?<!inter )(i[ck]t(al|us)|\bi[ck]t\b|criti(ques?|c[aio]|che)\b)|"
    r"[ck]onvul[sz]|kram(p|bi)|stuip|aanval|insult|toeval|napad|drgawk|padaczk|chvat|attacc|"
    r"kejang|\bserang(an)?\b|sawan|co giat|[dđ]ong kinh|kohtaus|kourist|\bn\S{1,2}bet|roham|"
    r"g\S{1,2}rcs|lekme|"
    r"priepuol|traukul|\bepi\w*hoog|tutqanoq|xuruj|k[ou]m[bv]uls|"
    r"^(epi(leps\w+)?|abs|эпи(лепс\w+)?|hoog|tutma|flog)( #?\d+)?$|"
    r"bangkitan|kifafa|degedege|frav.r|fr.nvaro|poissaolo|havale\b|"
    r"rangas|\bgrc(evi)?\b|krece\b|odsutnost|^absent[ae]$|\bt?tcg\b|ctcg|bns\b|blick nick|"
    r"kas[ıi]lma|ひきつけ|\b(cgtc|cpc)\b|^epil\w+?(ic[aoe]?|ique|isch\w?)$|electrodecr|"
    r"\bclin\w*\.? (start|beg[ai]n|debut|inicio)|\bevent:? (typical|habitual)|target event|"
    r"(etat|estado) de mal|stato di male|\bmal (epil|comit)|secondar\w* gen|"
    r"\w spells?\b|^(spell|episod[eio]o?)s?( #?\d+)?$|\bata(ky?|ck|que)|atta(ck|que)|"
    r"status epi|siez|"
    r"[sc][ei]+[zs]+[iu]+r|s[aeiu]+(z+[aeiu]*|s+u[aeiu]*)r|\bfits?\b|"
    r"\b(epi\w*|electro\w*|clinical) (event|episode|end|offset)|\b(ncse|sps|fas)\b|"
    r"\b(typical|habitual) (event|episode)|\b(sub|electro)clin|^(electrographic|status)$|"
    r"(?<!\d )\bcps\b|[ck]lonus|gelasti|hypermotor|hyperkinet|"
    r"(grand|petit|gd) ?mal|\b(abs|aus|ass)c?[ea]n[csz]\w*\b(?! (of|d[aei]|d')\b)|"
    r"gt(cs?|ka?s?)\b|\bf?btc\b|\b[fbp]*tcs\b|\btka\b|\bfias\b|\baura[es]?\b|"
    r"\ba?(tonic|tonisch|[ck]loni(?!d))|\bastat|spasm|m[yi]o[ck]lon|"
    # Russian, Ukrainian, Bulgarian, Greek, Chinese and Japanese (between seizures is none), Korean
    # (taken apart as `plain` does), Arabic, Persian, Hebrew, Hindi, Thai
    r"прист[уъ]п|припад|судо[рм]|напад|гърч|абсанс|тонико|клонус|миоклони|ұстама|таталт|уналт|"
    r"κρισ|σπασμ|欠神|失神|强直|"
    r"^(てんかん|癫痫|επιληπτικη)$|حمله|نوبات|תקף|[发發発]作(?!间|間)|抽搐|[惊驚]厥|"
    r"[痉痙][挛攣]|けいれん|ケイレン|\u1107\u1161\u11af\u110c\u1161\u11a8|"
    r"\u1100\u1167\u11bc\u1105\u1167\u11ab|"
    r"نوبة|تشنج|صرع|دورہ|مرگی|התקף|פרכוס|दौर|मिरगी|छार|झटक|ชัก")
# cells beside a seizure's text; a text within a seizure may doubt a channel, or deny the seizure
EDGES = re.compile(rf"((eeg|clin\w*|electr\w*) )?({_START}|{_END})")
_OUT = "reject|exclu|discard|delet|invalid|ignor|skip|remov|omit"
_UNTRUE = r"false ?(pos|al|det)|psychogen|dissocia|pseudo ?s|pseudo\b|p?nes\b|non ?epilep"
DENIES = re.compile(rf"(\w+ ){{0,2}}({_UNTRUE})\w*( \w+)?|({_OUT})\w*|"
                    r"(not|nicht) .*(seiz|sz|anfall)\w*")
DOUBTS = re.compile(
    r"\?+|fp|bad|(\S+ ){0,2}(possib|probab|suspe|uncertain|unsure|unclear|unlikely|doubt|"
    r"questionab|equivoc|art[ei]fa\w?t|false|fraglich|unklar|unsicher|moglich|verdacht|douteu|"
    r"dubbi|dudos|maybe|perhaps|vielleicht|functional|disagree|draft|pending|prelim|unconfirm|"
    rf"unreview|inter ?ictal|{_UNTRUE}|{_OUT})\w*( \w+){{0,2}}[ ?!.]*|"
    r"(not|nicht|kein|pas)( \w+){0,3}")
# pressed by the patient or who is there; perhaps for a seizure
BUTTON = re.compile(
    r"\bbutton|\bpush|\bpb\b|patient(en)? ?(event|ereignis|alarm|taste)|^pat\w* ev|"
    r"^(xl)?event( \d+)?( (start|end))?( \d+)?$|(event|ereignis) ?(mark|taste)|^alarm|"
    r"nurse call|\bknop\b|bouton|poussoir|pulsa(dor|nte)|botao|butonu?\b|按[钮鈕键鍵]|ホタン|кнопк")
CONFIRMS = re.compile(r"confirm|verif|\bvalid|accept|\bcertain|confiden|probab|includ|\bkeep|^use$|"
                      r"agree|consens|correlate|\bvotes?\b|^epileptic|^real|"
                      r"^(active|present|ictal)$|\b(gold|truth|final)\b|"
                      r"^(expert|rater|reader|reviewer|annotator) ?([1-9]|[a-e])$")
NO = re.compile(r"no?|nein|non|false|0([.,]0*)?( ?(/|%|of |von ).*)?|(very )?low|gering|niedrig|"
                r"faible|baj[ao]|bass[ao]")
YES = re.compile(r"y(es)?|ja?|oui|si|true|x|1([.,]0*)?")
# titles of a probability of the seizure, and of who found it; a program gives no truth
LIKELY = re.compile(r"confiden|\bprob(ab\w*)?\b|\bcertain|sicherheit|wahrsch|likel|poster|softmax|"
                    r"^(score|p|pred(ict\w*)?)\b")
FINDER = re.compile(r"sourc|detect|annotat|\brater|reader|origin|method|creat|author|tool|software|"
                    r"algor|model|scor|\bby$|quelle|ersteller")
PROGRAM = re.compile(r"(\S+ ){0,2}\b(persyst|encevis|besa\b|auto(?![a-ln-z]|matism|mot)|algorithm|"
                     r"detect(or|ion|ed by)|classifier|predict(ed|ion)|neural|seizuretransf)\w*"
                     r"( \S+){0,3}|^(ai|ki|cnn|dl|ml|nn|computer|software|machine)$")
ORDINALS = {word: number for number, words in enumerate((
    "first erste erster ersten", "second zweite zweiter zweiten", "third dritte dritter dritten",
    "fourth vierte vierter", "fifth"), 1) for word in words.split()}


@dataclass(frozen=True)
class Texts:
    """What the user says of annotation texts, beside DEFAULT_TEXTS: those that mark a seizure,
    (start, end) pairs that enclose one, and those of a recording that was read and has no other
    seizure."""
    seizure: tuple = ()
    pairs: tuple = ()
    background: tuple = ()

    def given(self):
        return [*self.seizure, *(text for pair in self.pairs for text in pair), *self.background]

    def meaning(self, text):
        """("seizure" | "start" | "end" | "background" | "", which pairs it belongs to, its number
        or None). The built-in pairs are pair -1."""
        said = plain(text)
        for place, meaning in enumerate(("start", "end")):
            pairs = {k for k, pair in enumerate(self.pairs) if pair[place] == said}
            built_in, number = meaning_of(said)
            if pairs:
                return meaning, pairs | ({-1} if built_in == meaning else set()), number
        if said in self.seizure:
            return "seizure", {-1}, None
        if said in self.background:
            return "background", set(), None
        return built_in, {-1}, number

    def unused(self, counts):
        """{text: how often} of those that mean nothing; what speaks of a seizure comes first."""
        left = [text for text in counts if not self.meaning(text)[0]]
        return {text: counts[text] for text in sorted(left, key=lambda t: not speaks(t))}


# letters of another alphabet than the one they are read in: no European word has three in a row,
# nor UTF-8's two for one letter; and alphabets of whose words none is known here, from Armenian to
# Mongolian
STRANGE = re.compile("[\x80-\xff]{3}|[\xc3-\xc5][\x80-\xbf]|"
                     "[\u0530-\u058f\u0980-\u0dff\u0e80-\u10ff\u1200-\u18af]")


def speaks(text):
    said = plain(text)
    # SzDetect is two words
    apart = plain(re.sub("(?<=[a-z])(?=[A-Z])", " ", text))
    return bool(SPEAKS.search(said) or SPEAKS.search(apart) or STRANGE.search(text)
                or "seizure" in said.replace(" ", ""))


def marks(text):
    """Whether a text speaks of a seizure, and not of there being none."""
    return speaks(text) and meaning_of(plain(text))[0] != "background"


def unlikely(title, cell):
    """Whether a cell gives a seizure less than one half, less than 50 of 100, or 1 vote of 3."""
    found = re.fullmatch(r"(\d*[.,]?\d+(?:e-\d+)?) ?(?:(%)|(?:/|of|von) ?(\d+))?", cell.lower())
    if not found or not (LIKELY if not found[3] else CONFIRMS).search(title):
        return False
    value = float(found[1].replace(",", "."))
    return value < (int(found[3]) / 2 if found[3] else 50 if found[2] or value > 10 else 0.5)


def plain(text):
    """A text as it is compared: small letters without accents, quotes and marks that are not seen,
    dashes and _ as blanks, without the channel that EDF+ puts behind @@."""
    letters = unicodedata.normalize("NFKD", text.partition("@@")[0].replace('"', ""))
    bare = "".join(letter for letter in letters
                   if not unicodedata.combining(letter) and unicodedata.category(letter) != "Cf")
    return " ".join(re.sub("[-_\u2010-\u2015]", " ", bare.lower()).split())


def meaning_of(said):
    """(what a plain text means by DEFAULT_TEXTS, its number or None)."""
    rest, number = without_number(said)
    for meaning, form in DEFAULT_TEXTS.items():
        # "no second seizure" leaves room for the first
        if form.fullmatch(rest) and (meaning != "background" or number is None):
            return meaning, number
    return "", None


def without_number(said):
    """A plain text without its number, and the number: "2nd seizure start" is "seizure start", 2.
    With more than one, or 0, it is left as it is."""
    words, numbers = [], []
    bare = re.sub(r"\b(no|nr|n°|num|number)[.:]? ?(?=#?\d)", "", said)     # no. 1 is no negation
    for word in re.sub(r"\b(seizure|seiz|sz|anfall|crise)#?(\d+)\b", r"\1 \2", bare).split():
        if word not in ("no.", "no:", "no,"):           # "No, seizure" denies nothing
            word = word.rstrip(":.,;")
        found = re.fullmatch(r"#?(\d{1,3})(st|nd|rd|th|er|e|eme|ere)?", word)
        if found or word in ORDINALS:
            numbers.append(int(found[1]) if found else ORDINALS[word])
        else:
            words.append(word)
    if len(numbers) > 1 or numbers == [0]:
        return said, None
    return " ".join(words), numbers[0] if numbers else None


def user_texts(seizure=(), background=()):
    """Texts of the command line's --seizure-label (TEXT or START..END) and --background-label."""
    single, pairs = [], []
    for text in seizure:
        parts = [plain(part) for part in text.split("..")]
        if len(parts) == 1:
            single += parts
        elif len(parts) == 2 and all(parts) and parts[0] != parts[1]:
            pairs.append(tuple(parts))
        else:
            raise DataError(f"--seizure-label {text}: START..END takes two different texts")
    background = [plain(text) for text in background]
    if not all([*single, *background]):
        raise DataError("--seizure-label and --background-label take a text")
    both = {*single, *(text for pair in pairs for text in pair)} & {*background}
    if both:
        raise DataError(f"{both.pop()!r} is a --seizure-label and a --background-label")
    return Texts(tuple(single), tuple(pairs), tuple(background))
