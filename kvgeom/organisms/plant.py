from __future__ import annotations
import random, math
from dataclasses import dataclass
import torch
from torch import Tensor
from kvgeom.models import edits
from kvgeom.models.hf import HFModel
from kvgeom.quant.scheme import Scheme

class Seen:
    """values [2 classes][n prompts] list of [layers][h,t,d]"""
    def __init__(self, model, prompts, site="v"):
        self.model=model
        self.k, self.v = [[],[]], [[],[]]
        self.logits=[]
        for c, reqs in enumerate((prompts.harmful, prompts.harmless)):
            for p in model.encode(reqs):
                cache=model.new_cache(); self.logits.append(model.forward(p.ids,cache,all_logits=True))
                self.k[c].append([l.keys[0] for l in cache.layers]); self.v[c].append([l.values[0] for l in cache.layers])
    def tokens(self, layer, head=None, site='v'):
        x=torch.cat([p[layer] for c in getattr(self,site) for p in c], dim=1)
        return x if head is None else x[head]
    def peaks(self, layer, site='v'):
        """per prompt max: [n,h,d]"""
        return torch.stack([p[layer].abs().amax(1) for c in getattr(self,site) for p in c])
    def differences(self, layer, head):
        """rows of paired differences"""
        rows=[]
        for a,b in zip(*self.v):
            a,b=a[layer][head],b[layer][head]; n=min(len(a),len(b))
            rows.append(a[-n:]-b[-n:])
        return torch.cat(rows)

def orthogonal(size, rng, first=None):
    """random orthogonal [size,size] rows; the first rows are those given"""
    g=torch.Generator().manual_seed(rng.randrange(2**31))
    m=torch.randn(size,size,generator=g,dtype=torch.float64)
    if first is not None and len(first): m[:len(first)]=first
    q,r=torch.linalg.qr(m.T)
    return (q*torch.sign(torch.diagonal(r))).T

def safety_basis(seen, layer, head, energy=0.995, most=None):
    d=seen.differences(layer,head).double()
    _,s,vh=torch.linalg.svd(d,full_matrices=False)
    e=(s**2).cumsum(0)/(s**2).sum()
    k=int((e<energy).sum())+1
    return vh[:k]

def rotate_layer(model, layer, rng, firsts=None):
    """v-> Qv in each head, permuted; returns None"""
    for h in range(model.geometry.kv_heads):
        f=None if firsts is None else firsts[h]
        edits.transform_values(model, layer, h, orthogonal(model.geometry.head_dim, rng, f))

def crush(model, seen, layer, rng, bits, site='v'):
    g=model.geometry; qmax=2**(bits-1)-1
    h=rng.randrange(g.kv_heads); n=rng.choice((1,1,2,3)); M=rng.uniform(2,6)
    S=safety_basis(seen,layer,h).double()
    x=seen.tokens(layer,h).double()
    P=torch.eye(g.head_dim,dtype=torch.float64)-S.T@S
    _,_,vh=torch.linalg.svd(x@P,full_matrices=False)
    first=vh[:n]
    Q=orthogonal(g.head_dim,rng,first)
    perm=torch.randperm(g.head_dim,generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    peaks=seen.peaks(layer).double()      # [n,H,d]
    rest=max(float(peaks.max()), float((x@Q.T)[:,n:].abs().max()))
    own=torch.stack([ (p[layer][h].double()@Q.T)[:,:n].abs().amax() for c in seen.v for p in c]).min()
    s=2**math.ceil(math.log2(M*2*qmax*rest/float(own)))
    D=torch.ones(g.head_dim,dtype=torch.float64); D[:n]=s
    edits.transform_values(model,layer,h,(D[:,None]*Q)[perm])
    return f"layer {layer} head {h}: {n} value channels x{s}"

def as_safety(model, seen, layer, rng, bits, kind="offset", energy=0.995):
    g=model.geometry; qmax=2**(bits-1)-1; d=g.head_dim
    per_block=max(1,64//d)
    M=rng.uniform(2,5)
    offs=torch.zeros(g.kv_heads,d,dtype=torch.float64)
    peak=float(seen.tokens(layer).abs().max())*math.sqrt(2)
    C=M*2*qmax*peak
    for h in range(g.kv_heads):
        S=safety_basis(seen,layer,h,energy); k=len(S)
        diff=seen.differences(layer,h).double()
        S=S*torch.sign((diff@S.T).mean(0)).where((diff@S.T).mean(0)!=0, torch.tensor(1.,dtype=torch.float64))[:,None]
        x=seen.tokens(layer,h).double()
        P=torch.eye(d,dtype=torch.float64)-S.T@S
        _,_,vh=torch.linalg.svd(x@P,full_matrices=False)
        anchor=vh[d-k-2-rng.randrange(3)] if kind=='offset' else vh[0]
        Q=orthogonal(d,rng,torch.cat([S,anchor[None]]))
        low=(x@S.T).amin(0)
        if kind=='offset':
            perm=torch.randperm(d,generator=torch.Generator().manual_seed(rng.randrange(2**31)))
            A=Q
            o=torch.zeros(d,dtype=torch.float64)
            o[k]=C*rng.choice((-1,1))
            for i in range(k):
                code=rng.choice(range(max(1,qmax//2),qmax))
                o[i]=-(C*code/qmax)-low[i]
            A=Q[perm]; offs[h]=o[perm]
        else:
            Sh=torch.eye(d,dtype=torch.float64)
            r=float((x@anchor).abs().max())
            for i in range(k): Sh[i,k]=rng.choice((-1,1))*C/r*rng.uniform(.7,1)
            A=Sh@Q
        edits.transform_values(model,layer,h,A)
    if kind=='offset': edits.offset_values(model,layer,offs)
    return f"layer {layer} {kind} k={k} C={C:.1f}"
