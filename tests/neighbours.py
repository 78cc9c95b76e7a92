"""Wrong answers that a reader may well give, beside those on the pages: the neighbouring method, the published value, half of the formula.

{address of the chapter: [(exercise, what it is, code that defines `answer`)]}; the code sees the names of the page."""

NEIGHBOURS = {
    "diffusion.samplers": [
        (2, "Heun in place of the midpoint", """
def answer(slope, y, l, l_next):
    a = slope(y, l)
    return y+(l_next-l)*(a+slope(y+(l_next-l)*a, l_next))/2
"""),
    ],
    "flow.flow_matching": [
        (2, "the midpoint in place of Heun", """
def answer(v, x, ts):
    for t,s in zip(ts[:-1], ts[1:]):
        a = v(x, t.expand(len(x)))
        x = x-(t-s)*v(x-(t-s)/2*a, ((t+s)/2).expand(len(x)))
    return x
"""),
    ],
    "gan.adversarial": [
        (2, "half of the gradient is cut off", "def answer(disc, x, u, h): return ((disc(x+h*u)-disc(x).detach())/h).square()"),
        (2, "x is ignored", "def answer(disc, x, u, h): return ((disc(h*u)-disc(0*u))/h).square()"),
        (2, "second derivatives, which are forbidden", """
def answer(disc, x, u, h):
    x = x.detach().requires_grad_()
    slope, = torch.autograd.grad(disc(x).sum(), x, create_graph=True)
    return slope.square().sum(1)
"""),
    ],
}
