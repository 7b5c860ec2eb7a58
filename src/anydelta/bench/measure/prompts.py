"""The prompts of `anydelta bench spec`: openings of nine chapters that the repository's model was not trained on.

From the King James Version as Debian's bible-kjv-text has it (public domain); examples/train_tiny/corpus.py says which
chapters are held out.
"""

PROMPTS: dict[str, str] = {
    "narrative": (
        "2 Kings 18\n1 Now it came to pass in the third year of Hoshea son of Elah king of Israel, that "
        "Hezekiah the son of Ahaz king of Judah began to reign.\n2 Twenty and five years old was he when "
        "he began to reign; and he reigned twenty and nine years in Jerusalem. His mother's name also "
        "was Abi, the daughter of Zachariah.\n3 And he did that which was right in the sight of the "
        "LORD, according to all that David his father did."
    ),
    "law": (
        "Leviticus 1\n1 And the LORD called unto Moses, and spake unto him out of the tabernacle of the "
        "congregation, saying,\n2 Speak unto the children of Israel, and say unto them, If any man of "
        "you bring an offering unto the LORD, ye shall bring your offering of the cattle, even of the "
        "herd, and of the flock.\n3 If his offering be a burnt sacrifice of the herd, let him offer a "
        "male without blemish: he shall offer it of his own voluntary will at the door of the tabernacle "
        "of the congregation before the LORD."
    ),
    "list": (
        "Ezra 8\n1 These are now the chief of their fathers, and this is the genealogy of them that went "
        "up with me from Babylon, in the reign of Artaxerxes the king.\n2 Of the sons of Phinehas; "
        "Gershom: of the sons of Ithamar; Daniel: of the sons of David; Hattush.\n3 Of the sons of "
        "Shechaniah, of the sons of Pharosh; Zechariah: and with him were reckoned by genealogy of the "
        "males an hundred and fifty.\n4 Of the sons of Pahathmoab; Elihoenai the son of Zerahiah, and "
        "with him two hundred males.\n5 Of the sons of Shechaniah; the son of Jahaziel, and with him "
        "three hundred males."
    ),
    "building": (
        "2 Chronicles 4\n1 Moreover he made an altar of brass, twenty cubits the length thereof, and "
        "twenty cubits the breadth thereof, and ten cubits the height thereof.\n2 Also he made a molten "
        "sea of ten cubits from brim to brim, round in compass, and five cubits the height thereof; and "
        "a line of thirty cubits did compass it round about.\n3 And under it was the similitude of oxen, "
        "which did compass it round about: ten in a cubit, compassing the sea round about. Two rows of "
        "oxen were cast, when it was cast."
    ),
    "song": (
        "Psalm 93\n1 The LORD reigneth, he is clothed with majesty; the LORD is clothed with strength, "
        "wherewith he hath girded himself: the world also is stablished, that it cannot be moved.\n2 Thy "
        "throne is established of old: thou art from everlasting.\n3 The floods have lifted up, O LORD, "
        "the floods have lifted up their voice; the floods lift up their waves."
    ),
    "wisdom": (
        "Proverbs 23\n1 When thou sittest to eat with a ruler, consider diligently what is before "
        "thee:\n2 And put a knife to thy throat, if thou be a man given to appetite.\n3 Be not desirous "
        "of his dainties: for they are deceitful meat.\n4 Labour not to be rich: cease from thine own "
        "wisdom."
    ),
    "argument": (
        "Job 15\n1 Then answered Eliphaz the Temanite, and said,\n2 Should a wise man utter vain "
        "knowledge, and fill his belly with the east wind?\n3 Should he reason with unprofitable talk? "
        "or with speeches wherewith he can do no good?\n4 Yea, thou castest off fear, and restrainest "
        "prayer before God."
    ),
    "gospel": (
        "Matthew 2\n1 Now when Jesus was born in Bethlehem of Judaea in the days of Herod the king, "
        "behold, there came wise men from the east to Jerusalem,\n2 Saying, Where is he that is born "
        "King of the Jews? for we have seen his star in the east, and are come to worship him."
    ),
    "letter": (
        "Romans 5\n1 Therefore being justified by faith, we have peace with God through our Lord Jesus "
        "Christ:\n2 By whom also we have access by faith into this grace wherein we stand, and rejoice "
        "in hope of the glory of God.\n3 And not only so, but we glory in tribulations also: knowing "
        "that tribulation worketh patience;"
    ),
}
