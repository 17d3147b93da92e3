"""The card of a model: its recipe, and its scores with what fixes their meaning."""

from ditjax.reporting.card import model_card

EVALUATION = {
    "step": 40,
    "metrics": {
        "fd_digits": 160.9137,
        "fd_digits_low": 149.1,
        "fd_digits_high": 172.71,
        "kd_digits": 2.25,
        "kd_digits_subset_deviation": 0.5,
    },
    "reference": "digits/train, 8x8",
    "protocol": {"metric": "FD-digits", "num_samples": 200},
    "protocol_hash": "0123abcd",
}


def test_a_card():
    recipe = {"model.size": "S", "data.name": "x:hf_" + "a" * 30}
    text = model_card("DiT-S/2", "made of nothing", "hf:me/one/a.safetensors", recipe, EVALUATION)
    assert text.startswith("---\nlibrary_name: ditjax\n")
    assert "`hf:me/one/a.safetensors` stands wherever ditjax takes weights" in text
    assert '| `model.size` | `"S"` |' in text
    assert '| `data.name` | `"x:***"` |' in text
    assert "| FD-digits | 161 | 149 to 173 |" in text
    assert "| KD-digits | 2.25 | - |" in text
    assert "deviation" not in text
    assert "Step 40, against digits/train, 8x8." in text
    assert "another protocol than `0123abcd`" in text
    assert '"num_samples": 200' in text
    assert "None are on record" not in text


def test_a_card_without_scores():
    text = model_card("DiT-S/2", "", "hf:me/one", {}, None)
    assert "None are on record: `evaluate` was not run." in text
