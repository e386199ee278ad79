"""Short texts of different kinds, on which vocabularies differ most."""

from __future__ import annotations

NEWS = """\
The harbour authority said on Tuesday that repairs to the northern breakwater would take until \
late October, three months longer than planned, after divers found that storms last winter had \
washed out much of the stone beneath it. Ferries will keep running from the southern pier, but \
the 7:15 morning service to the islands is cancelled for the summer.

"We would rather close one berth now than lose two in January," said Ines Halloran, who manages \
the port's engineering works. The extra cost, put at about 4.6 million, will be shared between \
the region and the shipping lines. Shopkeepers along the quay, who depend on day trippers, have \
asked the council to waive parking fees until the work is done; a vote is expected next week.
"""

CODE = '''\
from collections import deque


class MovingAverage:
    """Average the last `size` values."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, it must be at least 1")
        self.values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> float:
        self.values.append(value)
        return sum(self.values) / len(self.values)


if __name__ == "__main__":
    average = MovingAverage(3)
    for i, x in enumerate([1.0, 2.5, -4.0, 8.25]):
        print(f"{i:>3d}: {average.add(x):+.4f}")
'''

MATHS = r"""\begin{theorem}
Let $f : [a, b] \to \mathbb{R}$ be continuous and let $F(x) = \int_a^x f(t)\,dt$. Then $F$ is
differentiable on $(a, b)$ and $F'(x) = f(x)$.
\end{theorem}
\begin{proof}
Fix $x$ and $\varepsilon > 0$. Choose $\delta$ with $|f(t) - f(x)| < \varepsilon$ whenever
$|t - x| < \delta$. For $0 < |h| < \delta$,
\[
  \left| \frac{F(x+h) - F(x)}{h} - f(x) \right|
  = \left| \frac{1}{h} \int_x^{x+h} \bigl( f(t) - f(x) \bigr)\,dt \right| \le \varepsilon .
\]
\end{proof}
For example, with $f(t) = 3t^2 - 2t + 1$ we get $F(2) - F(0) = 8 - 4 + 2 = 6$.
"""

KOREAN = """\
어제 저녁에는 비가 많이 내려서 산책을 나가지 못했습니다. 대신 집에서 오래된 사진첩을 꺼내 \
보았는데, 할머니와 함께 바닷가에서 찍은 사진이 눈에 띄었습니다. 그때 나는 여섯 살이었고, \
모래성을 쌓느라 해가 지는 줄도 몰랐습니다. 오늘 아침에는 하늘이 맑게 개었으니 점심을 먹고 \
나서 친구와 강변을 따라 자전거를 탈 생각입니다. 돌아오는 길에는 시장에 들러 사과 세 개와 \
따뜻한 빵을 사려고 합니다.
"""

SAMPLES = {"news": NEWS, "code": CODE, "maths": MATHS, "korean": KOREAN}
